"""The callbacks, one file each.  The mathematics is in geometry/, the schedule in training/."""
