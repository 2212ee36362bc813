//! Compresses a linear layer of one's own module: a plan, the moments of what it reads, factors, and the layer in parts.
//!
//! cargo run --release --example own_module
#![allow(clippy::print_stdout)]

use bsbr_splitlinear::{
    Calibration, Factors, Group, LinearShape, Member, Moments, SplitConfig, SplitError, SplitLinear, compress_group,
    plan,
};
use burn::{
    module::{Module, Param},
    nn::{Linear, LinearConfig},
    tensor::{Device, Distribution, Tensor, activation::gelu},
};

#[derive(Module, Debug)]
struct Mlp {
    up: SplitLinear,
    down: Linear,
}

impl Mlp {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(gelu(self.up.forward(x)))
    }
}

fn main() -> Result<(), SplitError> {
    let device = Device::flex();
    let (inputs, outputs) = (64, 256);
    let up = LinearConfig::new(inputs, outputs).with_bias(false).init(&device);
    let mlp = Mlp {
        up: SplitLinear::new(up, vec![("whole".into(), 0..outputs)])?,
        down: LinearConfig::new(outputs, inputs).init(&device),
    };

    // What is compressed, and how far.
    let config = SplitConfig::from_toml(
        r"
        block_pattern = 'h\.(\d+)'
        keep = 0.5
        form = 'two-factor'
        [weight_types.up]
        pattern = '.*\.up$'
        ",
    )?;
    let path = "h.0.up".to_owned();
    let plan = plan(&config, &[LinearShape { path: path.clone(), inputs, outputs, bias: false, fused: Vec::new() }])?;
    let group = &plan.groups[0];

    // Inputs that lie near a space of few dimensions, as those of trained models do.
    let basis = Tensor::<2>::random([16, inputs], Distribution::Normal(0.0, 1.0), &device);
    let x = Tensor::<2>::random([2000, 16], Distribution::Normal(0.0, 1.0), &device).matmul(basis)
        + Tensor::random([2000, inputs], Distribution::Normal(0.0, 0.1), &device);
    let mut moments = Moments::new(inputs);
    moments.add_rows(&path, &x.clone().try_into_vec_as::<f32>().expect("numbers"))?;

    let weight = mlp.up.dense_weight().try_into_vec_as::<f32>().expect("numbers");
    let member = Member { name: &path, weight: &weight, calibration: Calibration::Inputs(&moments), held_out: None };
    let asked = Group {
        name: &group.name,
        share: group.share,
        form: group.form,
        inputs,
        outputs,
        rank: group.rank.expect("factors that are smaller than the weight"),
        members: &[member],
    };
    let (factors, report) = compress_group(&asked, &config.solve_settings())?;
    println!("rank {}: {} parameters of {}", factors.rank, report.parameters_after, report.parameters_before);

    let before = mlp.forward(x.clone());
    let tensor = |numbers: &[f32], shape: [usize; 2]| {
        Param::from_tensor(Tensor::<1>::from_floats(numbers, &device).reshape(shape))
    };
    let loaded = Factors {
        left: tensor(&factors.basis, [inputs, factors.rank]),
        right: tensor(&factors.coefficients[0], [factors.rank, outputs]),
        pivots: None,
        share: factors.share,
    };
    let compressed = Mlp { up: mlp.up.compress(0, loaded)?, down: mlp.down };
    let (after, size) = (compressed.forward(x), before.clone());
    let error = (after - before).powi_scalar(2).sum().sqrt() / size.powi_scalar(2).sum().sqrt();
    let error = error.try_into_vec_as::<f32>().expect("one number")[0];
    println!("relative error of the outputs: {error:.4}");
    assert!(error < 0.1, "{error}");
    Ok(())
}
