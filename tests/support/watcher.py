"""An observer of runs that tests ask afterwards."""


class Watcher:
    """An observer that remembers."""

    def __init__(self):
        self.plans = []
        self.reports = []
        self.pixels = 0

    def racing(self):
        self.raced = True

    def compiling(self):
        self.compiled = True

    def found(self, images, pixels):
        self.images = images

    def planned(self, plan, peak_bytes, number, done):
        self.plans.append(plan)

    def advanced(self, task):
        self.pixels += task.pixels

    def ended(self, report):
        self.reports.append(report)
