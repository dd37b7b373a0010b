"""The optimizer: ZeRO's flat buffers, AdamW over them, and the learning rate's course."""
