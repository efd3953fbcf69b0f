"""Writes monitoring/grafana/dashboards/*.json: `make dashboards`. A test fails when they are stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import bargauge, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import FieldColor, ThresholdsConfig
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    AxisPlacement,
    BarGaugeDisplayMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DynamicConfigValue,
    FieldColorModeId,
    GridPos,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
)

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME / "tools"))

from dashboard_panels import DASHBOARDS, Panel  # noqa: E402  # the path is set just above

OUT = HOME / "monitoring" / "grafana" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


def build_panel(panel: Panel, number: int, place: GridPos) -> Any:
    """Return the SDK's builder of a panel."""
    builder = _instant_panel(panel) if panel.kind in ("value", "bars") else _range_panel(panel)
    builder = (builder.id(number).title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
               .grid_pos(place))
    for letter, (query, legend) in zip("ABCDEFGH", panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query).legend_format(legend)
        builder = builder.with_target(target.instant() if panel.kind in ("value", "bars") else target.range())
    return builder


def _instant_panel(panel: Panel) -> Any:
    """Use an instant query: the last values of a range would include ended series, such as earlier phases."""
    last = ReduceDataOptions().calcs(["lastNotNull"])
    if panel.kind == "bars":
        return (bargauge.Panel().reduce_options(last).orientation(VizOrientation.HORIZONTAL).min(0)
                .display_mode(BarGaugeDisplayMode.BASIC)
                .color_scheme(FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME)))
    builder = stat.Panel().reduce_options(last).graph_mode(BigValueGraphMode.NONE)
    builder = builder.text_mode(BigValueTextMode.NAME if panel.names else BigValueTextMode.VALUE)
    if panel.texts:
        builder = builder.mappings([ValueMap(options={value: ValueMappingResult(text=text, color=colour)
                                                for value, (text, colour) in panel.texts.items()})])
    steps = panel.steps or ((0, "text"),)
    levels = [Threshold(value=None if place == 0 else value, color=colour)
              for place, (value, colour) in enumerate(steps)]
    return (builder.color_scheme(FieldColor().mode(FieldColorModeId.THRESHOLDS))
            .thresholds(ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(levels)))


def _range_panel(panel: Panel) -> Any:
    builder = timeseries.Panel().legend(
        VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    ).tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI)).min(0).line_width(1).fill_opacity(8)
    if panel.maximum is not None:
        builder = builder.max(panel.maximum)
    if panel.kind == "stack":
        builder = builder.stacking(StackingConfig().mode(StackingMode.NORMAL).group("A")).fill_opacity(60).line_width(0)
    if panel.outline:
        builder = builder.override_by_name(panel.outline, [
            DynamicConfigValue("custom.stacking", {"mode": StackingMode.NONE.value}),
            DynamicConfigValue("custom.fillOpacity", 0), DynamicConfigValue("custom.lineWidth", 2),
            DynamicConfigValue("color", {"mode": FieldColorModeId.FIXED.value, "fixedColor": "text"})])
    legend, unit = panel.right
    if legend:
        builder = builder.override_by_name(legend, [
            DynamicConfigValue("custom.axisPlacement", AxisPlacement.RIGHT.value), DynamicConfigValue("unit", unit)])
    return builder


def document(name: str) -> str:
    """Return a dashboard's JSON."""
    title, panels = DASHBOARDS[name]
    board = (dashboard.Dashboard(title).uid(f"shoehorn-{name}").tags(["shoehorn"]).refresh("30s").time("now-1h", "now")
            .timezone("browser").readonly().tooltip(DashboardCursorSync.CROSSHAIR)
            .link(dashboard.DashboardLink("Shoehorn").type(DashboardLinkType.DASHBOARDS).tags(["shoehorn"])
                  .keep_time(True).include_vars(True))
            .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
            .with_variable(_query("instance", "Appliance", "label_values(shoehorn_info, instance)")))
    if name == "vram":
        query = 'label_values(shoehorn_gpu_info{instance=~"$instance"}, gpu)'
        board = board.with_variable(_query("gpu", "GPU", query))
    left = top = row = 0
    for number, panel in enumerate(panels, 1):
        height = 4 if panel.kind == "value" else 8
        if left + panel.width > 24:
            left, top, row = 0, top + row, 0
        row = max(row, height)
        board = board.with_panel(build_panel(panel, number, GridPos(h=height, w=panel.width, x=left, y=top)))
        left += panel.width
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(board.build())), indent=1, sort_keys=True) + "\n"


def _query(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query).refresh(
        VariableRefresh.ON_TIME_RANGE_CHANGED)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for each in DASHBOARDS:
        (OUT / f"{each}.json").write_text(document(each), encoding="utf-8")
        print(OUT / f"{each}.json")
