"""What serving looks up: users and their events by key, winners' metadata by row."""
