"""What the engine costs around the payloads."""
