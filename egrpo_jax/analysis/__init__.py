"""Measures random steps of a flow one by one: their noise, rewards and gradients, and which tails are good enough."""
