"""The making of the embedded models: text encoder, image towers, flow model. One file each, one shared loop."""
