"""Images for people: grids and plots."""
