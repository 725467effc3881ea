"""A page on which a trained run is tried out: sentences, drawings, pictures and clips in; answers and experts out."""
