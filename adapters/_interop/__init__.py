"""Other programs' adapter formats: conversions between them and ours, without reading or writing a file."""
