//! The operations as fused loops over the memory of `flex` tensors.

mod maps;

use bsbr_kernels::layer::{self, NormKind, Panels, RowNorm, Rows};
use bsbr_weights::{Arithmetic, Matrix, StoredMatrix};
use burn::{
    backend::{BackendTypes, Flex},
    module::Param,
    tensor::{DType, Device, Tensor, TensorData},
};
use maps::{Layer, project};
use rayon::prelude::*;

use super::{Heads, Packing, show};
use crate::{
    Activation, AdapterTarget, ClampedGate, Projection,
    modules::{Adapter, HeadNormalisation, Mlp, Normalisation, Projections},
    rotary::Places,
    stored::Weight,
};

type Memory = <Flex as BackendTypes>::FloatTensorPrimitive;

/// Whether tensors of a device are what this module works on.
pub(super) fn is_here(device: &Device) -> bool {
    *device == Device::flex()
}

/// [`Packing::of`] on the device of the loops.
pub(super) fn packing_of(tokens: usize) -> Packing {
    match layer::Packing::of(tokens) {
        layer::Packing::Rows => Packing::Rows,
        layer::Packing::ByNumber | layer::Packing::Strips => Packing::Strips,
    }
}

impl From<Packing> for layer::Packing {
    fn from(packing: Packing) -> Self {
        match packing {
            Packing::ByNumber => Self::ByNumber,
            Packing::Rows => Self::Rows,
            Packing::Strips => Self::Strips,
        }
    }
}

/// The memory of a tensor, if the loops can run on it.
fn memory<const D: usize>(x: &Tensor<D>) -> Option<Memory> {
    if x.dtype() != DType::F32 {
        return None;
    }
    x.clone().try_into_primitive::<Flex>().ok()
}

/// Whether the loops can run on a tensor.
pub(super) fn runs<const D: usize>(x: &Tensor<D>) -> bool {
    memory(x).is_some()
}

/// The memory of a tensor of which [`memory`] was `Some`: to be changed in place if nothing else holds it.
fn taken<const D: usize>(x: Tensor<D>) -> Memory {
    x.try_into_primitive::<Flex>().unwrap_or_else(|_| unreachable!("asked before"))
}

/// Most jobs to a thread: several, because texts differ in length.
const JOBS_OF_A_THREAD: usize = 4;

/// [`super::each`] among the threads.
pub(super) fn each<I: Send, R: Send>(items: Vec<I>, work: impl Fn(I) -> R + Send + Sync) -> Vec<R> {
    // Items share the threads within themselves too, and a thread that waits for one begins another on top of it: how often is
    // bounded by the number of jobs.
    let of_a_job = items.len().div_ceil(JOBS_OF_A_THREAD * rayon::current_num_threads());
    items.into_par_iter().with_min_len(of_a_job).with_max_len(of_a_job).map(work).collect()
}

/// Numbers in order, and what keeps them.
struct Numbers(Memory);

impl Numbers {
    fn new<const D: usize>(x: &Tensor<D>) -> Option<Self> {
        Some(Self(memory(x)?.to_contiguous()))
    }

    fn of<const D: usize>(x: &Param<Tensor<D>>) -> Option<Self> {
        Self::new(&x.val())
    }

    fn get(&self) -> &[f32] {
        self.0.as_slice().unwrap_or_else(|| unreachable!("contiguous numbers"))
    }
}

fn tensor<const D: usize>(numbers: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(numbers, shape), &Device::flex())
}

/// `f` done to the numbers of a tensor, in place where nothing else holds them.
fn changed<const D: usize>(x: Tensor<D>, f: impl FnOnce(&mut [f32])) -> Tensor<D> {
    let shape = x.dims();
    let mut x = taken(x);
    let whole = x.is_contiguous() && x.storage::<f32>().len() == shape.iter().product::<usize>();
    if whole && let Some(numbers) = x.try_storage_mut::<f32>() {
        f(numbers);
        return Tensor::from_primitive::<Flex>(x);
    }
    let mut numbers = Numbers(x.to_contiguous()).get().to_vec();
    f(&mut numbers);
    tensor(numbers, shape)
}

/// A linear map and what keeps its numbers.
struct Map {
    weight: Held,
    inputs: usize,
    outputs: usize,
    bias: Option<Numbers>,
}

/// What keeps a weight.
enum Held {
    Tensor(Memory),
    Stored(StoredMatrix, Arithmetic),
}

impl Map {
    /// From a weight `[inputs, outputs]` that is a view of `[outputs, inputs]`, as every loaded weight is.
    fn new(weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Option<Self> {
        let [inputs, outputs] = weight.dims();
        let weight = memory(weight)?;
        let strides = weight.layout().strides();
        if !(inputs == 1 || strides[0] == 1) || !(outputs == 1 || strides[1] == inputs as isize) {
            return None;
        }
        let bias = match bias {
            Some(bias) => Some(Numbers::new(bias)?),
            None => None,
        };
        Some(Self { weight: Held::Tensor(weight), inputs, outputs, bias })
    }

    /// From a weight `[outputs, inputs]` as it is stored.
    fn stored(weight: &StoredMatrix, arithmetic: Arithmetic, bias: Option<&Tensor<1>>) -> Option<Self> {
        let [outputs, inputs] = weight.shape();
        let bias = match bias {
            Some(bias) => Some(Numbers::new(bias)?),
            None => None,
        };
        Some(Self { weight: Held::Stored(weight.clone(), arithmetic), inputs, outputs, bias })
    }

    fn of(weight: &Weight, bias: Option<&Tensor<1>>) -> Option<Self> {
        match weight {
            Weight::Tensor(weight) => Self::new(weight, bias),
            Weight::Stored(weight, arithmetic) => Self::stored(weight, *arithmetic, bias),
        }
    }

    fn view(&self) -> layer::Linear<'_> {
        let (weight, arithmetic) = match &self.weight {
            Held::Tensor(weight) => {
                let start = weight.layout().start_offset();
                let numbers = &weight.storage::<f32>()[start..start + self.inputs * self.outputs];
                (Matrix::of_f32(numbers, self.inputs), Arithmetic::F32)
            }
            Held::Stored(weight, arithmetic) => (weight.view(), *arithmetic),
        };
        layer::Linear { weight, bias: self.bias.as_ref().map(Numbers::get), arithmetic }
    }
}

/// An adapter and what keeps its numbers.
struct LowRank {
    down: Map,
    up: Map,
    scale: f32,
}

impl LowRank {
    fn of(adapter: Option<&Adapter>) -> Option<Option<Self>> {
        let Some(adapter) = adapter else { return Some(None) };
        let map = |weight: &Param<Tensor<2>>| Map::new(&weight.val(), None);
        Some(Some(Self { down: map(&adapter.down)?, up: map(&adapter.up)?, scale: adapter.scale as f32 }))
    }

    /// Adds `factor` times what it makes of `x`.
    fn add(&self, x: &Panels, factor: f32, out: &mut [f32]) {
        let low = &layer::project(x, &[self.down.view()])[0];
        layer::project(low, &[self.up.view()])[0].add(factor * self.scale, out);
    }
}

/// A norm and what keeps its numbers.
struct Norm {
    kind: NormKind,
    epsilon: f64,
    weight: Numbers,
    plus_one: bool,
    bias: Option<Numbers>,
}

impl Norm {
    fn of(norm: &Normalisation) -> Option<Self> {
        let (gamma, epsilon) = match norm {
            Normalisation::Layer(norm) | Normalisation::LayerPlusOne(norm) => (&norm.norm.gamma, norm.epsilon),
            Normalisation::Rms(norm) | Normalisation::RmsPlusOne(norm) => (&norm.gamma, norm.epsilon),
        };
        let (kind, bias) = match norm {
            Normalisation::Layer(norm) | Normalisation::LayerPlusOne(norm) => {
                (NormKind::Layer, norm.norm.beta.as_ref())
            }
            Normalisation::Rms(_) | Normalisation::RmsPlusOne(_) => (NormKind::Rms, None),
        };
        let bias = match bias {
            Some(bias) => Some(Numbers::of(bias)?),
            None => None,
        };
        let plus_one = matches!(norm, Normalisation::RmsPlusOne(_) | Normalisation::LayerPlusOne(_));
        Some(Self { kind, epsilon, weight: Numbers::of(gamma)?, plus_one, bias })
    }

    fn optional(norm: Option<&Normalisation>) -> Option<Option<Self>> {
        match norm {
            Some(norm) => Self::of(norm).map(Some),
            None => Some(None),
        }
    }

    fn view(&self) -> RowNorm<'_> {
        let (weight, bias) = (Some(self.weight.get()), self.bias.as_ref().map(Numbers::get));
        RowNorm { kind: self.kind, epsilon: self.epsilon as f32, weight, plus_one: self.plus_one, bias }
    }
}

pub(super) fn normalise<const D: usize>(norm: &Normalisation, x: &Tensor<D>) -> Option<Tensor<D>> {
    let norm = Norm::of(norm)?;
    let mut numbers = Numbers::new(x)?.get().to_vec();
    let shape = x.dims();
    layer::normalise(&mut numbers, shape[D - 1], &norm.view());
    Some(tensor(numbers, shape))
}

pub(super) fn linear(x: &Tensor<2>, weight: &Weight, bias: Option<&Tensor<1>>, packing: Packing) -> Option<Tensor<2>> {
    let [tokens, width] = x.dims();
    let (map, x) = (Map::of(weight, bias)?, Numbers::new(x)?);
    let x = Panels::pack_as(Rows::new(x.get(), width), None, packing.into());
    let mut out = vec![0.0; tokens * map.outputs];
    layer::project(&x, &[map.view()])[0].write(&mut out);
    Some(tensor(out, [tokens, map.outputs]))
}

/// A normalisation of queries or keys.
enum HeadNorm {
    Each(Norm),
    All(Norm),
}

impl HeadNorm {
    fn of(norm: Option<&HeadNormalisation>) -> Option<Option<Self>> {
        Some(match norm {
            None => None,
            Some(HeadNormalisation::Head(norm)) => Some(Self::Each(Norm::of(norm)?)),
            Some(HeadNormalisation::AllHeads(norm)) => Some(Self::All(Norm::of(norm)?)),
            Some(HeadNormalisation::EachHead(norm)) => {
                let plain = Norm::of(&norm.plain)?;
                // The norm itself has a weight too, of ones.
                let own = Tensor::<1>::from_primitive::<Flex>(plain.weight.0.clone());
                let weight = Numbers::new(&(norm.factor() * own.unsqueeze()))?;
                Some(Self::Each(Norm { weight, ..plain }))
            }
        })
    }
}

pub(super) fn heads(
    x: &Tensor<2>,
    norm: Option<&Normalisation>,
    projections: &Projections,
    places: Places<'_>,
    width: usize,
) -> Option<Heads> {
    let [tokens, hidden] = x.dims();
    let (x, norm) = (Numbers::new(x)?, Norm::optional(norm)?);
    let mut made = vec![(&projections.query, AdapterTarget::Query)];
    made.extend(projections.key.as_ref().map(|key| (key, AdapterTarget::Key)));
    made.extend(projections.value.as_ref().map(|value| (value, AdapterTarget::Value)));
    let layers = made.iter().map(|(projection, _)| Layer::of(projection)).collect::<Option<Vec<_>>>()?;
    let adapters = made.iter().map(|&(_, target)| LowRank::of(projections.adapter(target)));
    let adapters = adapters.collect::<Option<Vec<_>>>()?;
    let query_norm = HeadNorm::of(projections.query_norm.as_ref())?;
    let key_norm = HeadNorm::of(projections.key_norm.as_ref())?;
    let value_norm = HeadNorm::of(projections.value_norm.as_ref())?;
    let angles = match places.rotation {
        Some(rotation) => Some((Numbers::new(&rotation.cos)?, Numbers::new(&rotation.sin)?)),
        None => None,
    };
    let rotation = angles.as_ref().map(|(cos, sin)| {
        let (cos, sin) = (cos.get(), sin.get());
        layer::Rotation { cos, sin, half: cos.len() / tokens, interleaved: false }
    });
    let packing = places.packing.into();
    let x = Panels::pack_as(Rows::new(x.get(), hidden), norm.as_ref().map(Norm::view).as_ref(), packing);
    let mut projected = project(&x, &layers.iter().collect::<Vec<_>>());
    for (y, adapter) in projected.iter_mut().zip(adapters) {
        if let Some(adapter) = adapter {
            let mut out = vec![0.0; tokens * y.width()];
            y.write(&mut out);
            adapter.add(&x, 1.0, &mut out);
            *y = Panels::pack_as(Rows::new(&out, y.width()), None, packing);
        }
    }
    let norm_last = projections.norm_after_rotary;
    let placed = |y: &Panels, norm: &Option<HeadNorm>, rotation: Option<layer::Rotation<'_>>, temperature| {
        let total = y.width();
        let mut out = vec![0.0; tokens * total];
        let whole = match norm {
            Some(HeadNorm::All(norm)) => {
                y.write(&mut out);
                Some(Panels::pack_as(Rows::new(&out, total), Some(&norm.view()), packing))
            }
            Some(HeadNorm::Each(_)) | None => None,
        };
        let norm = match norm {
            Some(HeadNorm::Each(norm)) => Some(norm.view()),
            Some(HeadNorm::All(_)) | None => None,
        };
        let order = if norm_last { layer::HeadOrder::RotateThenNorm } else { layer::HeadOrder::NormThenRotate };
        layer::write_heads(whole.as_ref().unwrap_or(y), width, norm.as_ref(), rotation.as_ref(), order, &mut out);
        let factors: Option<&[f32]> = temperature;
        if let Some(factors) = factors {
            for head in out.chunks_exact_mut(tokens * width) {
                for (row, factor) in head.chunks_exact_mut(width).zip(factors) {
                    row.iter_mut().for_each(|x| *x *= factor);
                }
            }
        }
        tensor(out, [total / width, tokens, width])
    };
    let query = placed(projected.first()?, &query_norm, rotation, places.temperature);
    let rows = projected.get(1).map(|keys| {
        // Values of their own, or what the keys are made of.
        let values = placed(projected.get(2).unwrap_or(keys), &value_norm, None, None);
        [placed(keys, &key_norm, rotation, None), values]
    });
    Some(Heads { query, rows })
}

/// The inputs of [`super::join_heads`].
pub(super) struct JoinHeads {
    read: Memory,
    shape: [usize; 4],
    output: Layer,
    adapter: Option<LowRank>,
}

impl JoinHeads {
    pub(super) fn new(
        read: &Tensor<4>,
        (output, adapter): (&Projection, Option<&Adapter>),
        onto: &Option<(Tensor<2>, f64)>,
    ) -> Option<Self> {
        let shape = read.dims();
        let mut memory = memory(read)?;
        if memory.layout().strides()[3] != 1 || memory.layout().strides().iter().any(|&stride| stride < 0) {
            memory = memory.to_contiguous();
        }
        onto.as_ref().is_none_or(|(x, _)| runs(x)).then_some(())?;
        Some(Self { read: memory, shape, output: Layer::of(output)?, adapter: LowRank::of(adapter)? })
    }

    pub(super) fn run(self, onto: Option<(Tensor<2>, f64)>, packing: Packing) -> Tensor<2> {
        let [_, heads, tokens, width] = self.shape;
        let layout = self.read.layout();
        let rows = Rows {
            data: &self.read.storage::<f32>()[layout.start_offset()..],
            tokens,
            token_stride: layout.strides()[2] as usize,
            groups: heads,
            group_stride: layout.strides()[1] as usize,
            group_width: width,
        };
        add(&Panels::pack_as(rows, None, packing.into()), &self.output, self.adapter.as_ref(), onto)
    }
}

/// A map and its adapter, and a factor times them added to a tensor where there is one.
fn add(x: &Panels, layer: &Layer, adapter: Option<&LowRank>, onto: Option<(Tensor<2>, f64)>) -> Tensor<2> {
    let y = &project(x, &[layer])[0];
    let whole = |factor: f32, out: &mut [f32]| {
        y.add(factor, out);
        if let Some(adapter) = adapter {
            adapter.add(x, factor, out);
        }
    };
    match onto {
        Some((to, factor)) => changed(to, |to| whole(factor as f32, to)),
        None if adapter.is_some() => {
            let mut out = vec![0.0; y.tokens() * y.width()];
            whole(1.0, &mut out);
            tensor(out, [y.tokens(), y.width()])
        }
        None => rows(y),
    }
}

fn rows(x: &Panels) -> Tensor<2> {
    let mut out = vec![0.0; x.tokens() * x.width()];
    x.write(&mut out);
    tensor(out, [x.tokens(), x.width()])
}

/// The inputs of [`super::mlp`].
pub(super) struct WholeMlp<'a> {
    inner: Panels,
    mlp: &'a Mlp,
    down: Layer,
}

impl<'a> WholeMlp<'a> {
    pub(super) fn new(x: &Tensor<2>, norm: Option<&Normalisation>, mlp: &'a Mlp, packing: Packing) -> Option<Self> {
        let width = x.dims()[1];
        let (x, norm) = (Numbers::new(x)?, Norm::optional(norm)?);
        let norm = norm.as_ref().map(Norm::view);
        let x = Panels::pack_as(Rows::new(x.get(), width), norm.as_ref(), packing.into());
        Self::of(&x, mlp)
    }

    fn of(x: &Panels, mlp: &'a Mlp) -> Option<Self> {
        let (up, down) = (Layer::of(&mlp.up)?, Layer::of(&mlp.down)?);
        let gate = match &mlp.gate {
            Some(gate) => Some(Layer::of(gate)?),
            None => None,
        };
        if let Some(ClampedGate { limit, alpha }) = mlp.clamped_gate {
            let mut made = project(x, &[&up, gate.as_ref()?]).into_iter();
            let (mut inner, gate) = (made.next()?, made.next()?);
            layer::clamp_gated(limit as f32, alpha as f32, &mut inner, &gate);
            return Some(Self { inner, mlp, down });
        }
        let activation = match (mlp.activation, mlp.xielu) {
            (Activation::GeluTanh, _) => layer::Activation::GeluTanh,
            (Activation::GeluErf, _) => layer::Activation::GeluErf,
            (Activation::Silu, _) => layer::Activation::Silu,
            (Activation::Relu, _) => layer::Activation::Relu,
            (Activation::Relu2, _) => layer::Activation::Relu2,
            (Activation::Xielu, xielu) => {
                let (xielu, mut inner) = (xielu?, project(x, &[&up]).pop()?);
                inner.each(|x| xielu.of(x));
                return gate.is_none().then_some(Self { inner, mlp, down });
            }
        };
        let inner = match (&gate, up.dense()) {
            (None, Some(up)) => layer::gated(x, None, up.view(), activation),
            (Some(gate), Some(up)) if gate.dense().is_some() => {
                layer::gated(x, gate.dense().map(Map::view), up.view(), activation)
            }
            (gate, _) => {
                let layers: Vec<&Layer> = std::iter::once(&up).chain(gate).collect();
                let mut made = project(x, &layers).into_iter();
                let mut inner = made.next()?;
                layer::activate_gated(activation, &mut inner, made.next().as_ref());
                inner
            }
        };
        Some(Self { inner, mlp, down })
    }

    pub(super) fn run(self, x: Tensor<2>, onto: Option<f64>) -> Tensor<2> {
        show([Some(&self.mlp.down)], || rows(&self.inner));
        add(&self.inner, &self.down, None, onto.map(|factor| (x, factor)))
    }
}

/// What each of `experts` makes of some rows of `x` `[tokens, width]`, and that times a weight for each row added up by token.
///
/// A token gets the same numbers, bit for bit, whichever other tokens go through an expert beside it.
pub(super) fn experts(x: &Tensor<2>, experts: &[(&Mlp, Vec<(usize, f32)>)], packing: Packing) -> Option<Tensor<2>> {
    let [tokens, width] = x.dims();
    let x = Numbers::new(x)?;
    let packing = match packing {
        Packing::ByNumber => packing_of(tokens),
        chosen => chosen,
    };
    let through = |(expert, rows): &(&Mlp, Vec<(usize, f32)>)| {
        let gathered: Vec<f32> =
            rows.iter().flat_map(|&(token, _)| &x.get()[token * width..(token + 1) * width]).copied().collect();
        show([Some(&expert.up), expert.gate.as_ref()], || tensor(gathered.clone(), [rows.len(), width]));
        let expert = WholeMlp::of(&Panels::pack_as(Rows::new(&gathered, width), None, packing.into()), expert)?;
        show([Some(&expert.mlp.down)], || self::rows(&expert.inner));
        let made = &project(&expert.inner, &[&expert.down])[0];
        let mut out = vec![0.0; made.tokens() * made.width()];
        made.write(&mut out);
        Some(out)
    };
    let made: Vec<Option<Vec<f32>>> = experts.par_iter().map(through).collect();
    let mut out = vec![0.0; tokens * width];
    for (made, (_, rows)) in made.into_iter().zip(experts) {
        for (made, &(token, weight)) in made?.chunks_exact(width).zip(rows) {
            let out = &mut out[token * width..(token + 1) * width];
            out.iter_mut().zip(made).for_each(|(out, made)| *out += weight * made);
        }
    }
    Some(tensor(out, [tokens, width]))
}

pub(super) fn softcap(x: Tensor<2>, cap: f64) -> Tensor<2> {
    changed(x, |x| layer::softcap(x, cap as f32))
}
