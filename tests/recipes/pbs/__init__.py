"""PBS (OpenPBS, PBS Professional): one folder, which a row in ``launch/schedulers.py`` adds to Lockstep."""
