"""The tensors of published models, by name, shape and form."""
