"""What `rate` and `serve` share: one worker for the base in memory, access control, and the HTTP server."""
