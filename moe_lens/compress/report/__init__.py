"""Plans and verifications for people: tables, pictures, the model card, the hub."""
