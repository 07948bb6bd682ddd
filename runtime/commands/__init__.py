"""The commands of ``lockstep``, one file each."""
