"""Training across sites that keep their photos: what is averaged, what is exchanged, what that costs and gives away."""
