"""Steps: what is done to a block of images. Stages: the actors that do them."""
