//! The names and shapes of a decoder's weights: the one list that loading, converting and counting share.

use std::collections::BTreeMap;

use crate::{
    Activation, AdapterConfig, DecoderConfig, ExpertsConfig, GatedDelta, HeadNorm, LatentAttention, LayerKeys,
    LinearPlace, ModelConfig, Positions,
};

/// One weight of a decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightSpec {
    /// Name in `model.safetensors`.
    pub name: String,
    /// Shape. Linear weights are `[out, in]`, tables `[rows, hidden_size]`.
    pub shape: Vec<usize>,
    /// Added by BSBR: not part of the original model and never exported.
    pub extra: bool,
    /// Whole numbers, which files keep as I32.
    pub whole: bool,
}

/// Names of the four numbers of [`Activation::Xielu`], in their order.
pub(crate) const XIELU: [&str; 4] = ["alpha_p", "alpha_n", "beta", "eps"];

/// Prefix of the weights BSBR adds.
pub const EXTRA_PREFIX: &str = "bsbr.";

/// Every weight of the model, in file order.
///
/// Names: `embed.weight`, `position.weight`, `embed_norm.{weight,bias}`, `project_in.weight`,
/// `layers.{i}.{attention_norm,attention_post_norm,mlp_norm,mlp_post_norm}.{weight,bias}`,
/// `layers.{i}.attention.{query,key,value,output}.{weight,bias}`, `layers.{i}.attention.{query_norm,key_norm}.weight`,
/// `layers.{i}.attention.sink_logits`, `layers.{i}.attention.gate.{weight,bias}`,
/// of recurrent layers `layers.{i}.attention.{decay,rate,conv,read_norm}.weight`, `layers.{i}.attention.decay.bias` and
/// `layers.{i}.attention.decay_log`,
/// of latent attention `layers.{i}.attention.{query_latent,query_rotary,latent,key_rotary}.{weight,bias}`,
/// `layers.{i}.attention.from_latent.{query,query_rotary,key,value}.weight` and `layers.{i}.attention.{query_latent_norm,latent_norm}.weight`,
/// `layers.{i}.mlp.{gate,up,down}.{weight,bias}`, or `layers.{i}.mlp.router.{weight,bias,correction}`,
/// `layers.{i}.mlp.experts.{e}.{gate,up,down}.{weight,bias}`, `layers.{i}.mlp.shared.{gate,up,down}.{weight,bias}` and
/// `layers.{i}.mlp.shared_gate.weight`, beside an MLP also `layers.{i}.mlp.{dense_post_norm,experts_norm,experts_post_norm}.weight`,
/// `layers.{i}.mlp.router.{norm.weight,expert_scale}`, `layers.{i}.per_layer.{gate,down,norm}.weight` with `per_layer.{embed,project,norm}.weight`,
/// `layers.{i}.scalar`, `layers.{i}.mlp.xielu.{alpha_p,alpha_n,beta,eps}`, `final_norm.{weight,bias}`, `project_out.weight`,
/// `head.{weight,bias}`; of compressed parts what [`bsbr_splitlinear::SavedSplit`] says; for the `meta` selector
/// `bsbr.layers.{i}.{meta_query,meta_key}.{weight,bias}`, for calibrated states `bsbr.layers.{i}.state_basis`, for
/// gates `bsbr.layers.{i}.gates`, for adapters `bsbr.layers.{i}.attention.{query,key,value,output}.{adapter_down,adapter_up}`.
/// Which of them there are follows from the configuration.
pub fn weight_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    let d = &config.decoder;
    let taken = config.split.as_ref().map(|split| split.taken()).unwrap_or_default();
    let mut list = List { specs: Vec::new(), decoder: d, taken };
    let width = d.embedding_width();
    list.add("embed.weight".into(), &[d.vocab_size, width]);
    if d.positions == Positions::Learned {
        list.add("position.weight".into(), &[d.max_positions + d.embedding.position_offset, d.hidden_size]);
    }
    if d.embedding.norm {
        list.norm("embed_norm".into());
    }
    if d.embedding.width.is_some() {
        list.linear("project_in".into(), d.hidden_size, width, false);
    }
    if let Some(inputs) = d.embedding.per_layer {
        list.add("per_layer.embed.weight".into(), &[inputs.vocab_size, d.layers * inputs.width]);
        list.linear("per_layer.project".into(), d.layers * inputs.width, d.hidden_size, false);
        list.norm_of("per_layer.norm".into(), inputs.width);
    }
    for layer in 0..d.layers {
        let attention = config.layer_attention(layer);
        list.layer(layer, attention.is_some_and(|a| a.needs_meta()));
        if attention.is_some_and(|a| a.needs_state_basis()) {
            let name = format!("{EXTRA_PREFIX}layers.{layer}.state_basis");
            let shape = d.shape(layer);
            list.add(name, &[shape.kv_heads, shape.head_dim, shape.head_dim]);
        }
        if attention.is_some_and(|a| a.needs_gates()) {
            list.add(format!("{EXTRA_PREFIX}layers.{layer}.gates"), &[d.heads]);
        }
        if let Some(adapters) = config.adapters.as_ref().filter(|_| attention.is_some()) {
            list.adapters(layer, adapters);
        }
    }
    if d.block.form.final_norm() {
        list.norm("final_norm".into());
    }
    if d.embedding.width.is_some() {
        list.linear("project_out".into(), width, d.hidden_size, false);
    }
    if !d.tied_head {
        list.add("head.weight".into(), &[d.vocab_size, width]);
    }
    if d.head.bias {
        list.add("head.bias".into(), &[d.vocab_size]);
    }
    for group in config.split.iter().flat_map(|split| &split.groups) {
        let pivots = group.pivots();
        for (name, shape) in group.tensors() {
            let whole = Some(&name) == pivots.as_ref();
            list.specs.push(WeightSpec { name, shape, extra: false, whole });
        }
    }
    list.specs
}

/// The list while it is made.
struct List<'a> {
    specs: Vec<WeightSpec>,
    decoder: &'a DecoderConfig,
    /// Outputs that compressed parts make, of the layers that have some.
    taken: BTreeMap<&'a str, usize>,
}

impl List<'_> {
    fn add(&mut self, name: String, shape: &[usize]) {
        let extra = name.starts_with(EXTRA_PREFIX);
        self.specs.push(WeightSpec { name, shape: shape.to_vec(), extra, whole: false });
    }

    fn linear(&mut self, name: String, out: usize, input: usize, bias: bool) {
        let kept = out - self.taken.get(name.as_str()).copied().unwrap_or(0).min(out);
        if kept > 0 {
            self.add(format!("{name}.weight"), &[kept, input]);
        }
        if bias {
            self.add(format!("{name}.bias"), &[out]);
        }
    }

    fn norm(&mut self, name: String) {
        self.norm_of(name, self.decoder.hidden_size);
    }

    fn norm_of(&mut self, name: String, width: usize) {
        let d = self.decoder;
        if d.norm.has_weight() {
            self.add(format!("{name}.weight"), &[width]);
        }
        if d.norm.has_bias() {
            self.add(format!("{name}.bias"), &[width]);
        }
    }

    fn layer(&mut self, layer: usize, meta: bool) {
        let d = self.decoder;
        let at = |part: &str| format!("layers.{layer}.{part}");
        let shape = d.shape(layer);
        let (query_width, key_width) = (d.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let ((before_attention, before_mlp), after) = (d.block.form.norms_before(), d.block.form.norms_after());
        for (norm, there) in [
            ("attention_norm", before_attention),
            ("attention_post_norm", after),
            ("mlp_norm", before_mlp),
            ("mlp_post_norm", after),
        ] {
            if there {
                self.norm(at(norm));
            }
        }
        let recurrent = d.layer_recurrent(layer);
        if let Some(recurrent) = recurrent {
            self.recurrent(layer, recurrent);
        } else if let Some(latent) = d.latent {
            self.latent(layer, latent);
        } else {
            self.linear(at("attention.query"), query_width, d.hidden_size, d.qkv_bias);
        }
        let own_keys = !matches!(shape.keys, LayerKeys::Of { .. });
        let plain = d.latent.is_none() && recurrent.is_none();
        if own_keys && plain {
            self.linear(at("attention.key"), key_width, d.hidden_size, d.qkv_bias);
        }
        if shape.keys == LayerKeys::Own && plain {
            self.linear(at("attention.value"), key_width, d.hidden_size, d.qkv_bias);
        }
        if d.attention_gate && recurrent.is_none() {
            self.linear(at("attention.gate"), query_width, d.hidden_size, d.qkv_bias);
        }
        let read_heads = recurrent.map_or(d.heads, |recurrent| recurrent.value_heads);
        self.linear(at("attention.output"), d.hidden_size, read_heads * d.value_dim(layer), d.attention_output_bias);
        if let Some(over) = d.block.head_norm.filter(|_| recurrent.is_none()) {
            let of_keys = own_keys.then_some(("attention.key_norm.weight", shape.kv_heads));
            for (part, heads) in [("attention.query_norm.weight", d.heads)].into_iter().chain(of_keys) {
                match over {
                    HeadNorm::Head | HeadNorm::AllHeads if !d.norm.has_weight() => {}
                    HeadNorm::Head => self.add(at(part), &[shape.head_dim]),
                    HeadNorm::EachHead => self.add(at(part), &[heads, shape.head_dim]),
                    HeadNorm::AllHeads => self.add(at(part), &[heads * shape.head_dim]),
                }
            }
        }
        if d.sink_logits {
            self.add(at("attention.sink_logits"), &[d.heads]);
        }
        match d.layer_experts(layer) {
            None => self.mlp(&at("mlp"), shape.intermediate_size, d.mlp_bias),
            Some(experts) => {
                if experts.beside_mlp {
                    self.mlp(&at("mlp"), shape.intermediate_size, d.mlp_bias);
                    for norm in ["mlp.dense_post_norm", "mlp.experts_norm", "mlp.experts_post_norm"] {
                        self.norm(at(norm));
                    }
                }
                self.experts(&at("mlp"), experts);
            }
        }
        if let Some(inputs) = d.embedding.per_layer {
            self.linear(at("per_layer.gate"), inputs.width, d.hidden_size, false);
            self.linear(at("per_layer.down"), d.hidden_size, inputs.width, false);
            self.norm(at("per_layer.norm"));
        }
        if d.block.scalar {
            self.add(at("scalar"), &[1]);
        }
        if d.activation == Activation::Xielu {
            // Shapes as the numbers have them in checkpoints.
            let shapes: [&[usize]; 4] = [&[1], &[1], &[], &[]];
            for (part, shape) in XIELU.into_iter().zip(shapes) {
                self.add(at(&format!("mlp.xielu.{part}")), shape);
            }
        }
        if meta {
            for part in ["meta_query", "meta_key"] {
                self.linear(format!("{EXTRA_PREFIX}{}", at(part)), query_width, d.hidden_size, d.qkv_bias);
            }
        }
    }

    fn latent(&mut self, layer: usize, latent: LatentAttention) {
        for role in self.decoder.latent_roles() {
            let place = LinearPlace { layer, role };
            let Some([inputs, outputs]) = self.decoder.linear_shape(place) else { continue };
            self.linear(place.to_string(), outputs, inputs, self.decoder.linear_bias(role));
        }
        let at = |part: &str| format!("layers.{layer}.attention.{part}.weight");
        if let Some(rank) = latent.query_rank {
            self.add(at("query_latent_norm"), &[rank]);
        }
        self.add(at("latent_norm"), &[latent.rank]);
    }

    fn recurrent(&mut self, layer: usize, recurrent: &GatedDelta) {
        let d = self.decoder;
        let at = |part: &str| format!("layers.{layer}.attention.{part}");
        let (keys, values) = (recurrent.keys_width(), recurrent.values_width());
        for (part, width) in [("query", keys), ("key", keys), ("value", values), ("gate", values)] {
            self.linear(at(part), width, d.hidden_size, false);
        }
        self.add(at("decay.weight"), &[recurrent.value_heads, d.hidden_size]);
        self.add(at("decay.bias"), &[recurrent.value_heads]);
        self.add(at("decay_log"), &[recurrent.value_heads]);
        self.add(at("rate.weight"), &[recurrent.value_heads, d.hidden_size]);
        // As convolutions over one channel have it.
        self.add(at("conv.weight"), &[recurrent.channels(), 1, recurrent.kernel]);
        self.add(at("read_norm.weight"), &[recurrent.value_dim]);
    }

    fn mlp(&mut self, name: &str, inner: usize, bias: bool) {
        let d = self.decoder;
        if d.gated_mlp {
            self.linear(format!("{name}.gate"), inner, d.hidden_size, bias);
        }
        self.linear(format!("{name}.up"), inner, d.hidden_size, bias);
        self.linear(format!("{name}.down"), d.hidden_size, inner, bias);
    }

    fn experts(&mut self, name: &str, experts: &ExpertsConfig) {
        let d = self.decoder;
        self.add(format!("{name}.router.weight"), &[experts.count, d.hidden_size]);
        if experts.router.bias {
            self.add(format!("{name}.router.bias"), &[experts.count]);
        }
        if experts.router.own_norm {
            self.add(format!("{name}.router.norm.weight"), &[d.hidden_size]);
        }
        if experts.router.expert_scale {
            self.add(format!("{name}.router.expert_scale"), &[experts.count]);
        }
        if experts.router.correction {
            self.add(format!("{name}.router.correction"), &[experts.count]);
        }
        for expert in 0..experts.count {
            self.mlp(&format!("{name}.experts.{expert}"), experts.intermediate_size, experts.bias);
        }
        if let Some(shared) = experts.shared {
            self.mlp(&format!("{name}.shared"), shared.intermediate_size, d.mlp_bias);
            if shared.gate {
                self.add(format!("{name}.shared_gate.weight"), &[1, d.hidden_size]);
            }
        }
    }

    fn adapters(&mut self, layer: usize, adapters: &AdapterConfig) {
        for &target in &adapters.targets {
            let place = target.place(layer);
            let Some([inputs, outputs]) = self.decoder.linear_shape(place) else { continue };
            let name = format!("{EXTRA_PREFIX}{place}");
            self.add(format!("{name}.adapter_down"), &[adapters.rank, inputs]);
            self.add(format!("{name}.adapter_up"), &[outputs, adapters.rank]);
        }
    }
}

/// Numbers of the original model that one token is multiplied with or read from: all but the experts it does not go through.
pub fn active_parameters(config: &ModelConfig) -> usize {
    let idle = |spec: &WeightSpec| {
        let (layer, rest) = spec.name.strip_prefix("layers.")?.split_once(".mlp.experts.")?;
        let (expert, _) = rest.split_once('.')?;
        let experts = config.decoder.layer_experts(layer.parse().ok()?)?;
        Some(expert.parse::<usize>().ok()? >= experts.chosen)
    };
    let active = weight_specs(config).into_iter().filter(|spec| !spec.extra && idle(spec) != Some(true));
    active.map(|spec| spec.shape.iter().product::<usize>()).sum()
}

/// Numbers in the weights of the original model and numbers BSBR adds.
pub fn parameter_counts(config: &ModelConfig) -> (usize, usize) {
    weight_specs(config).iter().fold((0, 0), |(original, extra), spec| {
        let count = spec.shape.iter().product::<usize>();
        if spec.extra { (original, extra + count) } else { (original + count, extra) }
    })
}
