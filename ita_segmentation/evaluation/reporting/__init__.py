"""What an evaluation writes: tables, figures, example images and the page with all of them."""
