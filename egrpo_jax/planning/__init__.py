"""The cost of a run before it is started: what its phases compile to, for devices that need not be there."""
