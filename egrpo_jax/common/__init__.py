"""Used everywhere, by itself: errors, configs, trees, files that are whole or not there."""
