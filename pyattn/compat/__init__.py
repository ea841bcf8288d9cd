"""Drop-in faces: the names, signatures and meanings of other attention implementations."""
