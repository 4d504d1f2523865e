"""What several ops share: their declaration, registration, argument checks, and the machine's capabilities."""
