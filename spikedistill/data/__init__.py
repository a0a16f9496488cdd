"""0. What comes in: images, their augmentation."""
