"""A teacher asked once: what it says of prepared rows, on disk, in place of the teacher."""
