#!/usr/bin/env bash
# Train on several hosts: deepspeed's launcher starts the processes over ssh, with pdsh.
#
#   launch/cluster.sh --hostfile FILE [--interface NAME] [--master-addr ADDRESS] [--master-port PORT]
#                     [--check] CONFIG.toml [section.key=value ...]
#
#   launch/cluster.sh --hostfile hosts --interface eth0 configs/1b.toml run_dir=/shared/runs/a
#
# FILE has a line "HOST slots=PROCESSES" for each host. Every host sees this folder, the data and run_dir
# under the same paths, and lets the others in by ssh key. --interface names the network device the
# processes talk over; the address is the first host's, which the others must reach. Variables for all
# hosts, one NAME=VALUE a line, are taken from ~/.deepspeed_env. With --check nothing is trained, but
# `megalite check` says whether all these processes compute what they should. See docs/clusters.md.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$root/.venv/bin/python" ]; then export PATH="$root/.venv/bin:$PATH"; fi

mistake() { echo "cluster: $1; see launch/cluster.sh --help" >&2; exit 2; }

hostfile='' interface='' config='' command=train options=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --hostfile | --interface | --master-addr | --master-port)
        [ $# -ge 2 ] || mistake "$1 needs a value"
        case $1 in
        --hostfile) hostfile=$2 ;;
        --interface) interface=$2 ;;
        *) name=${1#--}; options+=("--${name/-/_}" "$2") ;; # deepspeed's own, spelt with _
        esac
        shift 2 ;;
    --check) command=check; shift ;;
    -*) mistake "unknown option $1" ;;
    *) config=$1; break ;;
    esac
done
[ -n "$hostfile" ] || mistake "--hostfile is missing"
[ -f "$hostfile" ] || mistake "no hostfile $hostfile"
[ -n "$config" ] || mistake "no config file given"
bad=$(grep -nEv '^[[:space:]]*(#.*)?$|^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*(#.*)?$' "$hostfile" | head -n1 || true)
[ -z "$bad" ] || mistake "$hostfile:${bad%%:*}: '${bad#*:}' is not HOST slots=PROCESSES"
for tool in deepspeed pdsh ssh; do
    command -v "$tool" >/dev/null || mistake "no $tool on PATH; install it (on Debian: apt-get install pdsh openssh-client)"
done

processes=$(awk '!/^[[:space:]]*#/ && sub(/.*slots=/, "") { n += $1 } END { print n }' "$hostfile")
WORLD_SIZE=$processes python -m megalite train "$@" --dry-run >/dev/null # a mistake ends here, said once

# deepspeed hands only a few variables on by itself, and the rest from a file. Ours is deleted once it is
# open, so that nothing is left behind however the launcher ends.
variables=$(mktemp)
{
    grep -hE '^[A-Za-z_][A-Za-z0-9_]*=' "${DS_ENV_FILE:-$HOME/.deepspeed_env}" 2>/dev/null || true
    [ -z "$interface" ] || printf '%s\n' "GLOO_SOCKET_IFNAME=$interface" "NCCL_SOCKET_IFNAME=$interface"
    for name in MEGALITE_EXIT_FILE OMP_NUM_THREADS DS_ACCELERATOR; do
        [ -z "${!name:-}" ] || echo "$name=${!name}"
    done
} >"$variables"
exec 9<"$variables"
rm "$variables"
export DS_ENV_FILE=/dev/fd/9

# Without it ssh, and so the whole command, would wait for ever for a host that has dropped off the
# network. ssh takes the first of two values, so yours come first.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=6"

# The words pass a remote shell, and deepspeed adds quotes of its own to one with a space in it.
words=()
for word in "$@"; do
    quoted=$(printf '%q' "$word")
    words+=("${quoted//\\ /$'$\'\\x20\''}")
done
# --force_multi: over ssh also when the file names one host, so that there is always a remote shell.
exec deepspeed --force_multi --hostfile "$hostfile" "${options[@]}" --module \
    megalite "$command" "${words[@]}"
