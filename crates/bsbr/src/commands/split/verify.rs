//! `bsbr split verify`.

use anyhow::Result;
use bsbr_model::Decoder;
use bsbr_splitlinear::{SavedSplit, Split, SplitConfig, SplitLinear, Tap, plan};
use burn::{
    module::Param,
    nn::Linear,
    tensor::{Device, Distribution, Tensor},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::setup::{Setup, SplitArgs};
use crate::{
    CheckFailed,
    device::DeviceArgs,
    record,
    report::{Forms, ReportArgs},
    running::load,
};

/// Largest difference of a layer in parts from the exact product.
const LAYER: f64 = 1e-5;
/// Of the logits, relative and absolute.
const MODEL: f64 = 1e-4;
/// Tokens of the text for the whole model.
const TOKENS: usize = 20;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// One check.
struct Check {
    name: String,
    difference: f64,
    limit: f64,
    /// Whether showing the inputs to someone changes no bit.
    calibrating: bool,
}

impl Check {
    fn passed(&self) -> bool {
        // NaN is past every limit.
        self.difference <= self.limit && self.calibrating
    }
}

pub(super) fn run(args: Args) -> Result<()> {
    args.report.check()?;
    let device = args.device.resolve()?;
    let mut checks = Vec::new();
    for (name, outputs, parts) in
        [("768 to 3072, whole", 3072, 1), ("768 to 2304, q k v", 2304, 3), ("768 to 2304, 36 heads", 2304, 36)]
    {
        checks.push(layer(name, outputs, parts, &device)?);
    }
    let setup = args.split.resolve()?;
    let decoder = load(bsbr_convert::ModelSource::open(&setup.model.dir)?, &device)?;
    for (name, config) in modes(&setup) {
        checks.push(model(&setup, &decoder, name, &config)?);
    }
    let passed = checks.iter().all(Check::passed);
    args.report.emit(&Forms {
        table: &|| {
            let lines = checks.iter().map(|check| {
                format!(
                    "{}: {}, largest difference {:.2e} (limit {:.0e}), calibrating {}",
                    if check.passed() { "passed" } else { "FAILED" },
                    check.name,
                    check.difference,
                    check.limit,
                    if check.calibrating { "the same bit for bit" } else { "DIFFERS" }
                )
            });
            Ok(lines.collect::<Vec<_>>().join("\n"))
        },
        json: &|| {
            let checks = checks.iter().map(|check| {
                serde_json::json!({
                    "name": check.name, "difference": check.difference, "limit": check.limit,
                    "calibrating_equal": check.calibrating, "passed": check.passed(),
                })
            });
            Ok(serde_json::json!({
                "schema": "bsbr-split-verify/1", "about": record::about(&setup.source.description(), None),
                "passed": passed, "checks": checks.collect::<Vec<_>>(),
            }))
        },
        rows: Some(&|report| report["checks"].as_array().cloned().unwrap_or_default()),
    })?;
    if passed { Ok(()) } else { Err(CheckFailed("layers in parts differ from whole ones".to_owned()).into()) }
}

/// A random layer in parts against the exact product of its numbers.
fn layer(name: &str, outputs: usize, parts: usize, device: &Device) -> Result<Check> {
    const INPUTS: usize = 768;
    device.seed(42);
    let bound = 1.0 / (INPUTS as f64).sqrt();
    let random = |shape: [usize; 2], spread| Tensor::<2>::random(shape, spread, device);
    // As loaded weights are: transposed in memory.
    let weight = random([outputs, INPUTS], Distribution::Uniform(-bound, bound)).transpose();
    let bias: Tensor<1> = Tensor::random([outputs], Distribution::Uniform(-bound, bound), device);
    let x = random([20, INPUTS], Distribution::Normal(0.0, 1.0));
    let width = outputs / parts;
    let columns = (0..parts).map(|part| (format!("part.{part}"), part * width..(part + 1) * width)).collect();
    let linear = Linear { weight: Param::from_tensor(weight.clone()), bias: Some(Param::from_tensor(bias.clone())) };
    let split = SplitLinear::new(linear, columns)?;
    let found = numbers(split.forward(x.clone()))?;
    let calibrating = numbers(split.with_tap(Some(Tap::new(|_| ()))).forward(x.clone()))? == found;
    let (x, weight, bias) = (numbers(x)?, numbers(weight)?, numbers(bias.unsqueeze())?);
    let mut difference = 0.0f64;
    for (x, found) in x.chunks(INPUTS).zip(found.chunks(outputs)) {
        for (output, &found) in found.iter().enumerate() {
            let products = x.iter().enumerate().map(|(at, &x)| f64::from(x) * f64::from(weight[at * outputs + output]));
            let exact = f64::from(bias[output]) + products.sum::<f64>();
            difference = difference.max((f64::from(found) - exact).abs());
        }
    }
    Ok(Check { name: name.to_owned(), difference, limit: LAYER, calibrating })
}

/// The configuration as it is, and with queries, keys and values apart, and each head, where a layer has them.
fn modes(setup: &Setup) -> Vec<(&'static str, SplitConfig)> {
    let decoder = &setup.source.model_config().decoder;
    let mut modes = vec![("whole model, as configured", setup.config.clone())];
    for (name, split) in [("whole model, q k v", Split::Qkv), ("whole model, heads", Split::Heads)] {
        let mut config = setup.config.clone();
        let mut changed = false;
        for linear in &setup.plan.linears {
            let fused: String = linear.shape.fused.iter().map(|(part, _)| *part).collect();
            let fits = fused == "qkv" || (split == Split::Heads && ["q", "k", "v"].contains(&fused.as_str()));
            if let Some(kind) = config.weight_types.get_mut(&linear.weight_type).filter(|_| fits) {
                (kind.split, kind.n_head, kind.n_kv_head) = (split, Some(decoder.heads), Some(decoder.kv_heads));
                changed = true;
            }
        }
        if changed {
            modes.push((name, config));
        }
    }
    modes
}

/// A model with every layer of the configuration in parts against the model itself.
fn model(setup: &Setup, decoder: &Decoder, name: &str, config: &SplitConfig) -> Result<Check> {
    let shapes: Vec<_> = setup.linears.iter().map(|linear| linear.shape.clone()).collect();
    let mut plan = plan(config, &shapes)?;
    plan.groups.iter_mut().for_each(|group| group.rank = Some(1));
    let saved = SavedSplit {
        format_version: SavedSplit::FORMAT_VERSION,
        keep: config.keep,
        base: String::new(),
        calibration: String::new(),
        groups: SavedSplit::of_plan(&plan, &setup.targets()).map_err(anyhow::Error::msg)?,
    };
    let vocabulary = decoder.config().decoder.vocab_size.min(1000) as u32;
    let mut random = StdRng::seed_from_u64(123);
    let tokens: Vec<u32> = (0..TOKENS).map(|_| random.random_range(0..vocabulary)).collect();
    let expected = numbers(decoder.forward(&tokens)?)?;
    let divided = decoder.divided(&saved)?;
    let found = numbers(divided.forward(&tokens)?)?;
    let calibrating = numbers(divided.watched(Tap::new(|_| ())).forward(&tokens)?)? == found;
    // As numpy's allclose: how far past the relative tolerance.
    let apart = found
        .iter()
        .zip(&expected)
        .map(|(&found, &expected)| (f64::from(found) - f64::from(expected)).abs() - MODEL * f64::from(expected).abs());
    let difference = apart.fold(0.0f64, |most, apart| if apart.is_nan() { f64::NAN } else { most.max(apart) });
    Ok(Check { name: name.to_owned(), difference, limit: MODEL, calibrating })
}

fn numbers(tensor: Tensor<2>) -> Result<Vec<f32>> {
    tensor.try_into_vec_as::<f32>().map_err(|error| anyhow::anyhow!("numbers cannot be read back: {error:?}"))
}
