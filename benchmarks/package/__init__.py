"""The package itself: what importing it and calling into it cost."""
