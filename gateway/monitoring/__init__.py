"""What is watched as studies pass: facts of each, windows of them, drift."""
