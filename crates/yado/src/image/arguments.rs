//! The command line of `yado image`: qemu-img's letters where they overlap.

use crate::size::Size;
use clap::builder::ValueHint;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub struct Image {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make an image
    Create(Create),
    /// Show what an image is
    Info(Info),
    /// Look for damage, and repair it
    Check(Check),
    /// Copy an image into another format
    Convert(Convert),
    /// Change the size of an image's disk
    Resize(Resize),
    /// Show what is stored where
    Map(Map),
    /// Compare the content of two images (exit code 1: they differ)
    Compare(Compare),
    /// List, make, apply or delete internal snapshots
    Snapshot(Snapshot),
    /// Put an image over another backing file
    Rebase(Rebase),
    /// Write what an image holds into its backing file
    Commit(Commit),
    /// Tell how large a new image's file would be
    Measure(Measure),
    /// Add, change or remove a persistent dirty bitmap of a qcow2 image
    Bitmap(super::qemu_img::arguments::Bitmap),
    /// Measure how fast requests are served
    Bench(super::qemu_img::arguments::Bench),
    /// Make a copy at once: by shared blocks where the file system can, else a qcow2 image on top of the original
    Clone(CloneImage),
    /// Make equal parts of several images one: by shared blocks where the file system can, or in a base that all build on
    Dedup(super::dedup::Dedup),
    /// Serve images to NBD clients until Ctrl-C
    Serve(super::serve::Serve),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Human,
    Json,
}

/// How results are shown.
#[derive(Debug, Clone, Copy, Args)]
pub struct Shown {
    /// human or json
    #[arg(long, value_enum, value_name = "FORM", default_value = "human")]
    pub output: Output,
    /// The same as --output json
    #[arg(long)]
    pub json: bool,
}

impl Shown {
    pub fn as_json(self) -> bool {
        self.json || self.output == Output::Json
    }
}

#[derive(Debug, Args)]
pub struct Create {
    /// Format of the new image
    #[arg(short = 'f', long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,
    /// Options of the format: NAME=VALUE[,...]; `-o help` lists them
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Image to build on
    #[arg(short = 'b', long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub backing: Option<String>,
    /// Its format
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The new image's file
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Size of the disk (default: that of the backing file)
    pub size: Option<Size>,
}

#[derive(Debug, Args)]
pub struct Info {
    /// Format of the image; needed to follow a chain
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// All images of the chain
    #[arg(long)]
    pub backing_chain: bool,
    /// Look though somebody may write the image
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    pub shown: Shown,
    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RepairWhat {
    Leaks,
    All,
}

#[derive(Debug, Args)]
pub struct Check {
    /// Format of the image
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Repair leaks, or all that can be
    #[arg(short = 'r', value_enum, value_name = "WHAT", conflicts_with = "repair")]
    pub what: Option<RepairWhat>,
    /// Repair all that can be, or what is said
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    pub repair: Option<RepairWhat>,
    /// Look though somebody may write the image
    #[arg(short = 'U', long, conflicts_with_all = ["repair", "what"])]
    pub force_share: bool,
    /// Say nothing but what is wrong
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub shown: Shown,
    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Convert {
    /// Format of the source
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Format of the target
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub target_format: String,
    /// Options of the target's format
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Compress clusters
    #[arg(short = 'c', long)]
    pub compress: bool,
    /// Do not make the target: write into the one that is there
    #[arg(short = 'n', long)]
    pub no_create: bool,
    /// The target that is there reads as zeroes
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,
    /// Runs of zeroes this long are not stored (0: everything is; default: 4K, and blocks are shared where the file system can)
    #[arg(short = 'S', long, value_name = "SIZE")]
    pub sparse: Option<Size>,
    /// Take an internal snapshot of the source
    #[arg(short = 'l', long, value_name = "NAME")]
    pub snapshot: Option<String>,
    /// Threads (default: one for each CPU)
    #[arg(short = 'm', long, value_name = "N")]
    pub threads: Option<usize>,
    /// Show progress (by default on a terminal)
    #[arg(short = 'p', long)]
    pub progress: bool,
    /// Write out of order (always so)
    #[arg(short = 'W', hide = true)]
    pub out_of_order: bool,
    /// Read though somebody may write the source
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The source
    #[arg(value_hint = ValueHint::FilePath)]
    pub source: PathBuf,
    /// The target
    #[arg(value_hint = ValueHint::FilePath)]
    pub target: PathBuf,
}

#[derive(Debug, Args)]
pub struct Resize {
    /// Format of the image
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Let the disk become smaller: what is cut off is lost
    #[arg(long)]
    pub shrink: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// New size; +SIZE and -SIZE are relative
    #[arg(allow_hyphen_values = true)]
    pub size: String,
}

#[derive(Debug, Args)]
pub struct Map {
    /// Format of the image
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Look though somebody may write the image
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    pub shown: Shown,
    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Compare {
    /// Format of the first image
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Format of the second image
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub second_format: Option<String>,
    /// Different sizes differ, even if what is beyond is zeroes
    #[arg(short, long)]
    pub strict: bool,
    /// Show progress (by default on a terminal)
    #[arg(short = 'p', long)]
    pub progress: bool,
    /// Read though somebody may write the images
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// One image
    #[arg(value_hint = ValueHint::FilePath)]
    pub first: PathBuf,
    /// Another image
    #[arg(value_hint = ValueHint::FilePath)]
    pub second: PathBuf,
}

#[derive(Debug, Args)]
pub struct Snapshot {
    /// Format of the image
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// List snapshots (the default)
    #[arg(short, long)]
    pub list: bool,
    /// Make one
    #[arg(short, long, value_name = "NAME", conflicts_with_all = ["list", "apply", "delete"])]
    pub create: Option<String>,
    /// Make the disk what it was
    #[arg(short, long, value_name = "NAME", conflicts_with_all = ["list", "delete"])]
    pub apply: Option<String>,
    /// Delete one
    #[arg(short, long, value_name = "NAME", conflicts_with = "list")]
    pub delete: Option<String>,
    /// Look though somebody may write the image
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Rebase {
    /// Format of the image
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// The new backing file; empty: none, the image will hold everything itself
    #[arg(short = 'b', long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub backing: String,
    /// Its format
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    /// Only change the name: the content must be the same
    #[arg(short = 'u', long = "unsafe")]
    pub blind: bool,
    /// Show progress (by default on a terminal)
    #[arg(short = 'p', long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Commit {
    /// Format of the image
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Leave the image as it is (else it is empty afterwards)
    #[arg(short = 'd', long)]
    pub keep: bool,
    /// Show progress (by default on a terminal)
    #[arg(short = 'p', long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Measure {
    /// Format of the source
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Format of the target
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub target_format: String,
    /// Options of the target's format
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Size of the disk, without a source
    #[arg(long, value_name = "SIZE", conflicts_with = "file")]
    pub size: Option<Size>,
    #[command(flatten)]
    pub shown: Shown,
    /// The source
    #[arg(value_hint = ValueHint::FilePath, required_unless_present = "size")]
    pub file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CloneImage {
    /// Format of the original
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: String,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The original
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// The clone
    #[arg(value_hint = ValueHint::FilePath)]
    pub clone: PathBuf,
}
