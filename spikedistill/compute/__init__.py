"""Where and how numbers are computed: the place of a run, and convolutions of our own."""
