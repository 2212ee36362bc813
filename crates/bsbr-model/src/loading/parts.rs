//! Parts of a block that not every decoder has, and its MLP.

use burn::module::Param;

use super::Loader;
use crate::{
    DecoderConfig, GatedDelta, LatentAttention, LatentPart, LatentProjections, LinearRole, MlpPart, ModelError, Norm,
    PerLayerInputs,
    modules::{BesideMlp, BlockMlp, LayerInputs, Mixture, PerLayerInput},
    recurrent::DeltaRule,
};

impl Loader<'_> {
    /// What latent attention has besides.
    pub(super) fn latent(
        &mut self,
        layer: usize,
        latent: LatentAttention,
        decoder: &DecoderConfig,
    ) -> Result<LatentProjections, ModelError> {
        let narrow = latent.query_rank.is_some();
        let rotary = if narrow { LinearRole::FromLatent(LatentPart::QueryRotary) } else { LinearRole::QueryRotary };
        let mut projection = |role| self.layer_projection(layer, role, decoder);
        let query_latent = narrow.then(|| projection(LinearRole::QueryLatent)).transpose()?;
        let query_rotary = projection(rotary)?;
        let (key_rotary, vector) = (projection(LinearRole::KeyRotary)?, projection(LinearRole::Latent)?);
        let mut norm = |part: &str, width: usize| {
            self.norm(&format!("layers.{layer}.attention.{part}"), Norm::Rms, latent.norm_eps, width)
        };
        Ok(LatentProjections {
            query_latent,
            query_latent_norm: latent.query_rank.map(|rank| norm("query_latent_norm", rank)).transpose()?,
            query_rotary,
            latent: vector,
            latent_norm: norm("latent_norm", latent.rank)?,
            key_rotary,
            rotary_dim: decoder.latent_parts().map_or(0, |(rotary, _)| rotary),
            value_dim: latent.value_dim,
        })
    }

    /// What a recurrent layer has besides.
    pub(super) fn recurrent(
        &mut self,
        layer: usize,
        recurrent: &GatedDelta,
        decoder: &DecoderConfig,
    ) -> Result<DeltaRule, ModelError> {
        let at = |part: &str| format!("layers.{layer}.attention.{part}");
        let conv = self.tensor::<3>(&at("conv.weight"))?.reshape([recurrent.channels(), recurrent.kernel]);
        Ok(DeltaRule {
            decay: self.linear(&at("decay"))?,
            decay_log: Param::from_tensor(self.tensor(&at("decay_log"))?),
            rate: self.linear(&at("rate"))?,
            conv: Param::from_tensor(conv.transpose()),
            read_norm: self.norm(&at("read_norm"), Norm::Rms, decoder.norm_eps, recurrent.value_dim)?,
            config: recurrent.clone(),
        })
    }

    /// What joins the inputs of a layer.
    pub(super) fn per_layer(&mut self, layer: usize, decoder: &DecoderConfig) -> Result<PerLayerInput, ModelError> {
        let norm = format!("layers.{layer}.per_layer.norm");
        Ok(PerLayerInput {
            gate: self.layer_projection(layer, LinearRole::PerLayerGate, decoder)?,
            down: self.layer_projection(layer, LinearRole::PerLayerDown, decoder)?,
            norm: self.norm(&norm, decoder.norm, decoder.norm_eps, decoder.hidden_size)?,
            activation: decoder.activation,
        })
    }

    pub(super) fn block_mlp(&mut self, layer: usize, decoder: &DecoderConfig) -> Result<BlockMlp, ModelError> {
        let role = |part| match part {
            MlpPart::Gate => LinearRole::Gate,
            MlpPart::Up => LinearRole::Up,
            MlpPart::Down => LinearRole::Down,
        };
        let Some(config) = decoder.layer_experts(layer) else {
            return Ok(BlockMlp::Dense(self.mlp(layer, role, decoder)?));
        };
        let at = |part: &str| format!("layers.{layer}.mlp.{part}");
        let router = self.linear(&at("router"))?;
        let correction = config.router.correction.then(|| self.numbers(&at("router.correction"))).transpose()?;
        let experts = (0..config.count).map(|expert| self.mlp(layer, |part| LinearRole::Expert(expert, part), decoder));
        let experts = experts.collect::<Result<Vec<_>, _>>()?;
        let shared = config.shared.map(|_| self.mlp(layer, LinearRole::Shared, decoder)).transpose()?;
        let shared_gate = self.optional_linear(&at("shared_gate"))?;
        let correction = correction.map(|(numbers, _)| numbers);
        let beside = if config.beside_mlp {
            let mlp = self.mlp(layer, role, decoder)?;
            let mut norm = |part: &str| self.norm(&at(part), decoder.norm, decoder.norm_eps, decoder.hidden_size);
            let (post_norm, experts_norm) = (norm("dense_post_norm")?, norm("experts_norm")?);
            Some(BesideMlp { mlp, post_norm, experts_norm, experts_post_norm: norm("experts_post_norm")? })
        } else {
            None
        };
        let own_norm = config.router.own_norm;
        let router_norm =
            own_norm.then(|| self.norm(&at("router.norm"), Norm::Rms, decoder.norm_eps, decoder.hidden_size));
        let router_norm = router_norm.transpose()?;
        let expert_scale = config.router.expert_scale.then(|| self.numbers(&at("router.expert_scale"))).transpose()?;
        let expert_scale = expert_scale.map(|(numbers, _)| numbers);
        let config = config.clone();
        Ok(BlockMlp::Mixture(Mixture {
            router,
            correction,
            experts,
            shared,
            shared_gate,
            beside,
            router_norm,
            expert_scale,
            config,
        }))
    }

    /// What makes the inputs of the layers.
    pub(super) fn per_layer_inputs(
        &mut self,
        inputs: PerLayerInputs,
        decoder: &DecoderConfig,
    ) -> Result<LayerInputs, ModelError> {
        Ok(LayerInputs {
            embed: self.table("per_layer.embed.weight")?,
            project: self.whole("per_layer.project")?,
            norm: self.norm("per_layer.norm", decoder.norm, decoder.norm_eps, inputs.width)?,
        })
    }
}
