"""Plans that merge experts: which belong together, and what becomes of them."""
