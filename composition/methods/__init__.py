"""Ways to compose, one file each; found by discovery."""
