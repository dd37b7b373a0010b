#!/usr/bin/env bash
# Train on this machine's processor: N processes over gloo, by torchrun.
#
#   launch/local_cpu.sh [-n N] [--check] CONFIG.toml [section.key=value ...]
#
#   launch/local_cpu.sh -n 2 configs/quickstart.toml run_dir=runs/a 'data.sources=[{path="data/train"}]'
#
# N is half the number of cores unless given; each process computes with one thread. With --check it is
# not trained, but `megalite check` says whether these processes compute what they should.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$root/.venv/bin/python" ]; then export PATH="$root/.venv/bin:$PATH"; fi

mistake() { echo "local_cpu: $1; see launch/local_cpu.sh --help" >&2; exit 2; }

cores=$(env -u OMP_NUM_THREADS nproc) # which would answer with that variable
processes=$((cores > 1 ? cores / 2 : 1)) config= command=train
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -n) processes=${2:-}; shift; [ $# -eq 0 ] || shift ;;
    --check) command=check; shift ;;
    -*) mistake "unknown option $1" ;;
    *) config=$1; break ;;
    esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || mistake "-n needs a number of processes, not '$processes'"
[ -n "$config" ] || mistake "no config file given"
command -v torchrun >/dev/null || mistake "no torchrun on PATH and no $root/.venv; run launch/quickstart once"

# No GPU, so that megalite takes gloo. A mistake in the configuration ends in the next line, said once.
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
WORLD_SIZE=$processes python -m megalite train "$@" --dry-run >/dev/null
exec torchrun --standalone --nproc-per-node "$processes" -m megalite "$command" "$@"
