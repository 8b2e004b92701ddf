//! The report as a picture: memory and start times of the arms side by side.
//!
//! What it deliberately does not do: round, smooth or leave out; every bar carries its figure.

use plotters::coord::Shift;
use plotters::prelude::*;

use super::BenchError;
use super::report::{Arm, ArmReport, BenchReport};

const SIZE: (u32, u32) = (960, 420);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);

const fn color(arm: Arm) -> RGBColor {
    match arm {
        Arm::Raw => RGBColor(0xb0, 0x4a, 0x3a),
        Arm::View => RGBColor(0x2f, 0x6f, 0x9f),
        Arm::Overlay => RGBColor(0x8a, 0x8f, 0x98),
    }
}

type Bars<'a> = (&'a str, fn(&ArmReport) -> f64);
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws the report as SVG.
///
/// # Errors
/// The drawing library fails.
pub fn svg(report: &BenchReport) -> Result<String, BenchError> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&area, report).map_err(|e| BenchError::Chart(e.to_string()))?;
    }
    Ok(text)
}

fn draw(area: &Area<'_>, report: &BenchReport) -> Result<(), Box<dyn std::error::Error>> {
    const MIB: f64 = (1 << 20) as f64;
    area.fill(&WHITE)?;
    let title = format!(
        "{} containers of one image on {}, Linux {}",
        report.containers, report.file_system, report.kernel
    );
    let area = area.titled(&title, ("sans-serif", 18).into_font().color(&INK))?;
    let (memory, times) = area.split_horizontally(560);
    let memory_bars: [Bars<'_>; 3] = [
        ("page cache", |a| a.memory.page_cache_bytes as f64 / MIB),
        ("Pss_File", |a| a.memory.pss_file_bytes as f64 / MIB),
        ("kernel", |a| a.memory.kernel_bytes as f64 / MIB),
    ];
    let time_bars: [Bars<'_>; 2] =
        [("cold start", |a| a.cold_start.mean_ms), ("warm start", |a| a.warm_start.mean_ms)];
    panel(&memory, "all containers, MiB", &memory_bars, &report.arms, true)?;
    panel(&times, "mean of the containers, ms", &time_bars, &report.arms, false)?;
    area.present()?;
    Ok(())
}

/// Groups of bars, one bar an arm.
fn panel(
    area: &Area<'_>,
    unit: &str,
    bars: &[Bars<'_>],
    arms: &[ArmReport],
    legend: bool,
) -> Result<(), Box<dyn std::error::Error>> {
    let highest = bars.iter().flat_map(|(_, of)| arms.iter().map(of)).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(26)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..bars.len() as f64, 0.0..highest * 1.25)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_desc(unit)
        .y_label_formatter(&|y| format!("{y:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    let small = ("sans-serif", 12).into_font().color(&INK);
    let width = 0.8 / arms.len().max(1) as f64;
    for (n, arm) in arms.iter().enumerate() {
        let boxes = bars.iter().enumerate().map(|(group, (_, of))| {
            let left = group as f64 + 0.1 + n as f64 * width;
            Rectangle::new([(left, 0.0), (left + width * 0.92, of(arm))], color(arm.arm).filled())
        });
        let series = chart.draw_series(boxes)?;
        if legend {
            let fill = color(arm.arm).filled();
            series
                .label(arm.arm.name())
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], fill));
        }
        chart.draw_series(bars.iter().enumerate().map(|(group, (_, of))| {
            let left = group as f64 + 0.1 + n as f64 * width;
            let figure = if of(arm) < 10.0 { format!("{:.1}", of(arm)) } else { format!("{:.0}", of(arm)) };
            EmptyElement::at((left, of(arm))) + Text::new(figure, (2, -14), small.clone())
        }))?;
    }
    chart.draw_series(bars.iter().enumerate().map(|(group, (name, _))| {
        EmptyElement::at((group as f64 + 0.1, 0.0)) + Text::new((*name).to_owned(), (2, 6), small.clone())
    }))?;
    if legend {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .border_style(WHITE)
            .draw()?;
    }
    Ok(())
}
