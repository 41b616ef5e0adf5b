"""What `rate` and `serve` share: one worker for the base in memory, who may ask, and the HTTP server."""
