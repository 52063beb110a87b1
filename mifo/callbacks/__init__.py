"""What a run shows and logs while it learns; each callback is one file, and one option of `callbacks=`."""
