"""What any trainer needs and the paper does not mention. README.md describes the rooms."""
