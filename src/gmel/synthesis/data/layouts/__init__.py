"""How folders of photos are laid out: one layout a file, each of which lists photos without opening them."""
