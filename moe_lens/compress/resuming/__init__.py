"""Where a run keeps what it has done, so that whatever stops it costs little: a work folder."""
