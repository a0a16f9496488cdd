"""Where and how numbers are computed: device and number format, and our own convolutions."""
