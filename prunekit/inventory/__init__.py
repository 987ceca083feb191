"""What discovery found, told: as a tree, as JSON, as a picture."""
