"""What this machine gives: versions, memory, speed, and what the hub has cached here."""
