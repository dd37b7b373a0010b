"""What a run survives: requests to stop, loss spikes, erring processors, hangs and lost ranks."""
