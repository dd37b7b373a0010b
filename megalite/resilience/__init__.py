"""What a run survives: requests to stop, and later spikes, hangs and lost ranks."""
