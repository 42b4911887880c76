"""How the embedded models are made: text encoder, image towers, flow model. One file each, one shared loop."""
