"""Plans that take experts, or channels inside them, away."""
