"""Passes on the flat graph of one length, in which every segment and every layer is written out."""
