"""Every metric of the Grafana dashboard is one that the server has."""

import json
import re
import unittest

_SUFFIX = re.compile(r"_(bucket|sum|count)$")


class DashboardTest(unittest.TestCase):

    def test_metrics_exist(self):
        with open("service/prometheus_metrics.cc", encoding="utf-8") as source:
            known = set(re.findall(r'"(tenon_\w+)"', source.read()))
        self.assertGreater(len(known), 20)
        with open("service/deploy/grafana.json", encoding="utf-8") as dashboard:
            panels = json.load(dashboard)["panels"]
        shown = set()
        for panel in panels:
            for target in panel["targets"]:
                shown.update(re.findall(r"tenon_\w+", target["expr"]))
        self.assertEqual({_SUFFIX.sub("", name) for name in shown} - known, set())
        self.assertEqual(known - {_SUFFIX.sub("", name) for name in shown}, set())


if __name__ == "__main__":
    unittest.main()
