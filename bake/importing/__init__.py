"""Models in other formats → base models as transformers has them."""
