"""Recipes: defaults of the stanza that belong together. Imports nothing: --help of the tools answers at once."""

RECIPES = {
    'paper': {},
    'low_bit': dict(
        reparameterize=True, activation=dict(observer='mse', softmax='per_head'),
        synthesis=dict(start='dead_leaves', entropy=0.0, diversity=3.0, lr=0.05, num_images=96, steps=16),
        reconstruction=dict(steps=300), game=dict(holdout=0.11, gain=0.1)),
}
"""What a stanza that does not say otherwise gets from each recipe; our choice, by trials on DeiT-Tiny."""
